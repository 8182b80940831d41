/* Includes a device that never ends. */
#include "/dev/urandom"
int main(void) { return 0; }
