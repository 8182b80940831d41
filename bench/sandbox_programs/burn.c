/* Uses as many seconds of CPU time as its argument says, and prints what the kernel says that it used. */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static double used(void) {
    struct timespec now;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}

int main(int count, char **arguments) {
    double seconds = count > 1 ? atof(arguments[1]) : 1;
    while (used() < seconds)
        for (volatile int step = 0; step < 100000; step++)
            ;
    printf("%.6f\n", used());
}
