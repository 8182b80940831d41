#include <stdio.h>
int main(void) { printf("lost"); *(volatile int *)0 = 1; }
