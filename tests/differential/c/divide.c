#include <stdio.h>
int main(int n, char **v) { volatile int z = n - 1; printf("%d\n", 1 / z); }
