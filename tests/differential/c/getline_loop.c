// differential: {"stdin": "a\nbb\nccc"}
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
int main(void) { char *l = 0; size_t n = 0; ssize_t r; while ((r = getline(&l, &n, stdin)) > 0) printf("%zd\n", r); free(l); return feof(stdin) ? 0 : 1; }
