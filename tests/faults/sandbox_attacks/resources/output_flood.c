/* Writes for ever to both outputs. */
#include <string.h>
#include <unistd.h>

int main(void) {
    char text[4096];
    memset(text, 'x', sizeof text);
    for (;;) {
        (void)!write(1, text, sizeof text);
        (void)!write(2, text, sizeof text);
    }
}
