/* Tries in one program what the Python probes try one by one: files, system calls, sockets, signals, privileges. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

static char zeros[256];

static void allowed(const char *what, long result) {
    if (result >= 0)
        printf("%s\n", what);
}

static void refused(const char *what, long result) {
    if (result >= 0 || (errno != EPERM && errno != ENOSYS && errno != EACCES))
        printf("%s: %ld, errno %d\n", what, result, errno);
}

static void look_for_files(const char *secret) {
    const char *paths[] = {secret, "/etc/shadow", "/proc/1/environ", "/proc/1/mem", "/proc/1/root/etc/shadow",
                           "/proc/kcore", "/proc/kmsg", "/dev/mem", "/dev/kmsg", "/sys/fs/cgroup/cgroup.procs"};
    for (unsigned index = 0; index < sizeof paths / sizeof *paths; index++) {
        int file = open(paths[index], O_RDONLY);
        if (file >= 0 && read(file, zeros, 1) == 1)
            printf("read %s\n", paths[index]);
    }
    const char *shared[] = {"/usr/mine", "/mine", "/etc/mine", "/dev/mine", "/proc/sys/kernel/core_pattern"};
    for (unsigned index = 0; index < sizeof shared / sizeof *shared; index++)
        allowed(shared[index], open(shared[index], O_WRONLY | O_CREAT, 0600));
    for (int descriptor = 3; descriptor < 1024; descriptor++)
        if (fcntl(descriptor, F_GETFD) >= 0)
            printf("descriptor %d is open\n", descriptor);
}

static void call_the_kernel(void) {
    const struct { const char *name; int flag; } spaces[] = {
        {"mount", CLONE_NEWNS}, {"user", CLONE_NEWUSER}, {"pid", CLONE_NEWPID}, {"net", CLONE_NEWNET},
        {"ipc", CLONE_NEWIPC}, {"uts", CLONE_NEWUTS}, {"cgroup", CLONE_NEWCGROUP}};
    for (unsigned index = 0; index < sizeof spaces / sizeof *spaces; index++) {
        refused(spaces[index].name, unshare(spaces[index].flag));
        long pid = syscall(SYS_clone, spaces[index].flag | SIGCHLD, 0, 0, 0, 0);
        if (pid == 0)
            _exit(0);
        refused(spaces[index].name, pid);
    }
    int own = open("/proc/self/ns/net", O_RDONLY);
    refused("setns", setns(own, CLONE_NEWNET));
    close(own);
    refused("mount", mount("tmpfs", "/tmp", "tmpfs", 0, 0));
    refused("umount", umount2("/tmp", MNT_DETACH));
    refused("chroot", chroot("/tmp"));
    refused("pivot_root", syscall(SYS_pivot_root, "/tmp", "/tmp"));
    refused("ptrace", ptrace(PTRACE_ATTACH, 1, 0, 0));
    refused("ptrace", ptrace(PTRACE_TRACEME, 0, 0, 0));
    refused("keyctl", syscall(SYS_keyctl, 0, -3, 1));
    refused("add_key", syscall(SYS_add_key, "user", "name", zeros, 5, -1));
    refused("bpf", syscall(SYS_bpf, 0, zeros, 64));
    refused("io_setup", syscall(SYS_io_setup, 1, zeros));
    refused("io_uring", syscall(SYS_io_uring_setup, 8, zeros));
    refused("userfaultfd", syscall(SYS_userfaultfd, 1));
    refused("perf_event_open", syscall(SYS_perf_event_open, zeros, 0, -1, -1, 0));
    refused("personality", syscall(SYS_personality, 0x40000));
    refused("process_vm_readv", syscall(SYS_process_vm_readv, 1, zeros, 1, zeros, 1, 0));
    refused("open_tree", syscall(SYS_open_tree, AT_FDCWD, "/", 1));
    refused("mknod", mknod("/tmp/device", S_IFBLK | 0666, makedev(8, 0)));
    refused("sethostname", sethostname("mine", 4));
    for (int family = 0; family < 64; family++)
        if (family != AF_UNIX)
            allowed("socket", socket(family, SOCK_DGRAM, 0));
}

static void ask_for_power(void) {
    struct rlimit all = {RLIM_INFINITY, RLIM_INFINITY};
    allowed("setuid", setuid(0));
    allowed("setgid", setgid(0));
    struct rlimit core;
    setrlimit(RLIMIT_CORE, &all); /* seems to succeed and has no effect */
    allowed("core", getrlimit(RLIMIT_CORE, &core) == 0 && core.rlim_max == 1 ? -1 : 0);
    allowed("processes", setrlimit(RLIMIT_NPROC, &all));
    allowed("priority", setpriority(PRIO_PROCESS, 0, -5));
    allowed("oom_score_adj", -(write(open("/proc/self/oom_score_adj", O_WRONLY), "-1000", 5) < 0));
    for (int pid = 1; pid < 1000; pid++)
        if (pid != getpid())
            allowed("kill", kill(pid, SIGKILL));
    printf(geteuid() < 1000 ? "runs as a user of the system\n" : "");
}

int main(int count, char **arguments) {
    look_for_files(count > 1 ? arguments[1] : "/etc/shadow");
    call_the_kernel();
    ask_for_power();
    puts("held");
}
