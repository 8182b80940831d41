// differential: {"stdin": "abcdef"}
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
int main(void) { struct stat s; fstat(0, &s); printf("%d %d\n", S_ISREG(s.st_mode), mmap(0, 6, PROT_READ, MAP_PRIVATE, 0, 0) == MAP_FAILED); }
