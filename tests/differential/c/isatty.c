#include <stdio.h>
#include <fcntl.h>
#include <errno.h>
#include <unistd.h>
int main(void) { printf("%d %d %d %d\n", isatty(0), isatty(1), open("/dev/tty", O_RDWR), errno); }
