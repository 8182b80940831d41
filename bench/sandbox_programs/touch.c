/* Touches as many KiB of memory as its argument says. */
#include <stdlib.h>
#include <string.h>

int main(int count, char **arguments) {
    size_t bytes = (size_t)atol(arguments[1]) << 10;
    char *held = malloc(bytes + 1);
    if (!held)
        return 2;
    memset(held, count, bytes);
    __asm__ volatile("" : : "r"(held) : "memory");
    return 0;
}
