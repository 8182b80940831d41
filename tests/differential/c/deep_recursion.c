#include <stdio.h>
static int f(int n) { volatile char b[64]; b[0] = n; return n ? 1 + f(n - 1) + b[0] - b[0] : 0; }
int main(void) { printf("%d\n", f(50000)); }
