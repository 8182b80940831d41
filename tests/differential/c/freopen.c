// differential: {"stdin": "x y"}
#include <stdio.h>
int main(void) { char w[9]; freopen("/dev/stdin", "r", stdin); scanf("%8s", w); puts(w); fflush(stdout); freopen("/dev/stdout", "w", stdout); puts("again"); freopen("out.txt", "w", stdout); puts("file"); fprintf(stderr, "err\n"); }
