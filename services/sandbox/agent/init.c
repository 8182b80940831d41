/* PID 1 of a sandbox.
 *
 * Without arguments: reaps what the program leaves until it is killed, and the sandbox with it.
 *
 *   init SOCKET FILTER
 *
 * In a container: waits for a request on the descriptor SOCKET (SOCK_SEQPACKET), runs the job as its child, reaps what the
 * job leaves, and reports how the job ended. It is root with the capabilities to become another user and no others; the
 * job is that user and has none. FILTER is the descriptor of a file with the instructions of the system-call filter.
 *
 * A request is one packet of strings, each ended by NUL: the job's user; the number of resource limits, then each one's
 * number and value; the number of arguments, then the arguments; the variables. The job's descriptors come with it, from
 * 0 on. Reports are 'r' when it is ready for a request, 'x' and an errno (int) when the command cannot be executed, then
 * 'w' and the job's wait status (int).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define MOST_INSTRUCTIONS 1024
#define MOST_BYTES (160 * 1024)
#define MOST_STRINGS 8192
#define MOST_DESCRIPTORS 16
#define HIGH_DESCRIPTOR 100

static struct sock_filter instructions[MOST_INSTRUCTIONS];
static char request[MOST_BYTES + 1];
static char *arguments[MOST_STRINGS], *variables[MOST_STRINGS];
static int descriptors[MOST_DESCRIPTORS], descriptor_count;

static void report(int channel, char kind, int value) {
    char message[1 + sizeof value];
    message[0] = kind;
    memcpy(message + 1, &value, sizeof value);
    if (write(channel, message, sizeof message) < 0)
        _exit(124);
}

static void install_filter(int file) {
    ssize_t size = pread(file, instructions, sizeof instructions, 0);
    if (size <= 0 || size % (ssize_t)sizeof instructions[0])
        _exit(123);
    struct sock_fprog program = {.len = size / sizeof instructions[0], .filter = instructions};
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
        _exit(122);
    close(file);
}

/* Receives the packet of the request; returns its size. Ends when the socket closes. */
static ssize_t receive_request(int channel) {
    char control[CMSG_SPACE(MOST_DESCRIPTORS * sizeof(int))];
    struct iovec part = {.iov_base = request, .iov_len = MOST_BYTES};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ssize_t size = recvmsg(channel, &message, MSG_CMSG_CLOEXEC);
    if (size <= 0)
        _exit(0);
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    if (!header || header->cmsg_type != SCM_RIGHTS || message.msg_flags & (MSG_TRUNC | MSG_CTRUNC))
        _exit(121);
    descriptor_count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    memcpy(descriptors, CMSG_DATA(header), descriptor_count * sizeof(int));
    return size;
}

static char *next_string(char **cursor, const char *end) {
    char *string = *cursor;
    if (string >= end)
        _exit(120);
    *cursor += strlen(string) + 1;
    return string;
}

static void take_limits(char **cursor, const char *end) {
    for (int left = atoi(next_string(cursor, end)); left > 0; left--) {
        int resource = atoi(next_string(cursor, end));
        rlim_t value = strtoull(next_string(cursor, end), NULL, 10);
        struct rlimit limit = {.rlim_cur = value, .rlim_max = value};
        if (setrlimit(resource, &limit))
            _exit(119);
    }
}

static void take_strings(char **cursor, const char *end) {
    int count = atoi(next_string(cursor, end));
    if (count < 1 || count >= MOST_STRINGS)
        _exit(118);
    for (int index = 0; index < count; index++)
        arguments[index] = next_string(cursor, end);
    for (int index = 0; *cursor < end; index++) {
        if (index + 1 >= MOST_STRINGS)
            _exit(117);
        variables[index] = next_string(cursor, end);
    }
}

/* Makes the job's descriptors 0 and up, and closes all others but the channel, which moves out of their way. */
static int install_descriptors(int channel) {
    int high = fcntl(channel, F_DUPFD_CLOEXEC, HIGH_DESCRIPTOR);
    for (int index = 0; index < descriptor_count; index++)
        descriptors[index] = fcntl(descriptors[index], F_DUPFD_CLOEXEC, HIGH_DESCRIPTOR);
    for (int index = 0; index < descriptor_count; index++)
        if (dup2(descriptors[index], index) < 0)
            _exit(116);
    for (int other = descriptor_count; other < HIGH_DESCRIPTOR; other++)
        close(other);
    return high;
}

static void become_user(uid_t user) {
    for (int capability = 0; prctl(PR_CAPBSET_READ, capability) >= 0; capability++)
        if (prctl(PR_CAPBSET_DROP, capability))
            _exit(115);
    if (setgroups(0, NULL) || setresgid(user, user, user) || setresuid(user, user, user))
        _exit(114);
    if (prctl(PR_SET_DUMPABLE, 1) || chdir("/box"))
        _exit(113);
    umask(077);
}

static void become_job(int channel, ssize_t size) {
    char *cursor = request;
    const char *end = request + size;
    uid_t user = atoi(next_string(&cursor, end));
    channel = install_descriptors(channel);
    take_limits(&cursor, end);
    take_strings(&cursor, end);
    if (setsid() < 0)
        _exit(112);
    become_user(user);
    environ = variables; /* whose PATH is searched */
    if (strchr(arguments[0], '/'))
        execv(arguments[0], arguments); /* a shell does not take what is no program for a script of its own */
    else
        execvp(arguments[0], arguments);
    report(channel, 'x', errno);
    _exit(127);
}

/* Without arguments the C library is not set up, which would take longer than the rest of the start. */
#if defined(__x86_64__)
__asm__(".globl begin\nbegin: cmpq $1, (%rsp)\n jne _start\n jmp reap_forever\n");

static long call(long number, long a, long b, long c, long d) {
    register long fourth __asm__("r10") = d;
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(fourth)
                     : "rcx", "r11", "memory");
    return result;
}
#elif defined(__aarch64__)
__asm__(".globl begin\nbegin: ldr x9, [sp]\n cmp x9, #1\n b.ne _start\n b reap_forever\n");

static long call(long number, long a, long b, long c, long d) {
    register long x8 __asm__("x8") = number;
    register long result __asm__("x0") = a;
    register long x1 __asm__("x1") = b, x2 __asm__("x2") = c, x3 __asm__("x3") = d;
    __asm__ volatile("svc 0" : "+r"(result) : "r"(x8), "r"(x1), "r"(x2), "r"(x3) : "memory");
    return result;
}
#endif

/* The kernel reaps the children of a process that ignores their ends. */
__attribute__((used, noreturn, no_stack_protector)) void reap_forever(void) {
    static const struct {
        void *handler;
        unsigned long flags, restorer, mask;
    } ignored = {.handler = SIG_IGN};
    if (call(SYS_prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0) || call(SYS_prctl, PR_SET_DUMPABLE, 0, 0, 0) ||
        call(SYS_rt_sigaction, SIGCHLD, (long)&ignored, 0, 8))
        call(SYS_exit_group, 110, 0, 0, 0);
    for (;;)
        call(SYS_ppoll, 0, 0, 0, 0);
}

int main(int count, char **words) {
    /* The sandbox dies with the process that started it; processes of the job's user may not look into this one. */
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) || prctl(PR_SET_DUMPABLE, 0))
        return 110;
    if (count == 1)
        reap_forever();
    if (count != 3 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        return 109;
    int channel = atoi(words[1]);
    install_filter(atoi(words[2]));
    report(channel, 'r', 0);
    ssize_t size = receive_request(channel);
    pid_t job = fork();
    if (job < 0)
        return 108;
    if (job == 0)
        become_job(channel, size);
    /* The job's pipes close when the job's processes end, not when this one does. */
    for (int index = 0; index < descriptor_count; index++)
        close(descriptors[index]);
    for (;;) {
        int status;
        pid_t ended = wait(&status);
        if (ended < 0 && errno != EINTR)
            return 107;
        if (ended == job) {
            report(channel, 'w', status);
            return 0;
        }
    }
}
