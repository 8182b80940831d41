/* Includes a device that never ends and has no line in it. */
#include "/dev/zero"
int main(void) { return 0; }
