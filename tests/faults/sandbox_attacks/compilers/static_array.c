/* Asks for a program of four gigabytes. */
char large[1ull << 32] = {1};
int main(void) { return large[1ull << 31]; }
