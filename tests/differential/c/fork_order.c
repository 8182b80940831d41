#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>
int main(void) { printf("twice "); if (!fork()) { printf("child\n"); return 3; } int s; wait(&s); printf("parent %d\n", WEXITSTATUS(s)); }
