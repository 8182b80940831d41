/* Includes files of the host, so that the compiler's errors show them. */
#include "@SECRET@"
#include "/proc/self/root@SECRET@"
#include "/proc/1/root@SECRET@"
#include "/etc/shadow"
int main(void) { return 0; }
