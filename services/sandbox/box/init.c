/* PID 1 of a container: installs the system-call filter, runs the job as its child, reaps what the job leaves, and tells
 * how the job ended. It is root with the capabilities to become another user and no others; the job is that user and has
 * none.
 *
 *   init N UID COMMAND [ARGUMENT...]
 *
 * The job has the descriptors 0 to N-1. Descriptor N is a pipe to the supervisor: 's' is written to it when the job is
 * about to start, then 'x' and an errno (int) when the command cannot be executed, then 'w' and the job's wait status
 * (int). Descriptor N+1 is a file with the filter's instructions.
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
#include <sys/wait.h>
#include <unistd.h>

#define MOST_INSTRUCTIONS 1024

static struct sock_filter instructions[MOST_INSTRUCTIONS];

static void tell(int reports, char kind, int value) {
    char message[1 + sizeof value];
    message[0] = kind;
    memcpy(message + 1, &value, sizeof value);
    if (write(reports, message, kind == 's' ? 1 : sizeof message) < 0)
        _exit(124);
}

static void install_filter(int file) {
    ssize_t size = pread(file, instructions, sizeof instructions, 0);
    if (size <= 0 || size % (ssize_t)sizeof instructions[0])
        _exit(123);
    struct sock_fprog program = {.len = size / sizeof instructions[0], .filter = instructions};
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
        _exit(122);
}

static void become_user(uid_t user) {
    for (int capability = 0; prctl(PR_CAPBSET_READ, capability) >= 0; capability++)
        if (prctl(PR_CAPBSET_DROP, capability))
            _exit(116);
    if (setgroups(0, NULL) || setresgid(user, user, user) || setresuid(user, user, user))
        _exit(115);
    if (prctl(PR_SET_DUMPABLE, 1) || chdir("/box"))
        _exit(114);
}

int main(int count, char **arguments) {
    if (count < 4)
        return 121;
    int reports = atoi(arguments[1]), filter = reports + 1;
    /* A runtime that is killed takes its container with it. */
    if (prctl(PR_SET_PDEATHSIG, SIGKILL))
        return 113;
    /* Processes of the job's user may not look into this one. */
    if (prctl(PR_SET_DUMPABLE, 0) || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        return 120;
    install_filter(filter);
    close(filter);
    tell(reports, 's', 0);
    pid_t job = fork();
    if (job < 0)
        return 119;
    if (job == 0) {
        if (fcntl(reports, F_SETFD, FD_CLOEXEC) || setsid() < 0)
            _exit(118);
        become_user(atoi(arguments[2]));
        execvp(arguments[3], arguments + 3);
        tell(reports, 'x', errno);
        _exit(127);
    }
    /* The job's pipes close when the job's processes end, not when this one does. */
    for (int descriptor = 0; descriptor < reports; descriptor++)
        close(descriptor);
    for (;;) {
        int status;
        pid_t ended = wait(&status);
        if (ended < 0 && errno != EINTR)
            return 117;
        if (ended == job) {
            tell(reports, 'w', status);
            return 0;
        }
    }
}
