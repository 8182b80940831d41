/* Computes for ever and ignores every signal that can be ignored. */
#include <signal.h>

int main(void) {
    sigset_t all;
    for (int number = 1; number < 65; number++)
        signal(number, SIG_IGN);
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, 0);
    for (volatile unsigned long counter = 0;; counter++)
        ;
}
