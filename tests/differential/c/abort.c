#include <stdlib.h>
#include <stdio.h>
int main(void) { puts("x"); fflush(stdout); abort(); }
