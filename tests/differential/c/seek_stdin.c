// differential: {"stdin": "abcdef"}
#include <stdio.h>
#include <unistd.h>
int main(void) { printf("%d", getchar()); printf(" %ld", (long)lseek(0, 0, SEEK_SET)); printf(" %d %ld\n", fseek(stdin, 0, SEEK_END), ftell(stdin)); }
