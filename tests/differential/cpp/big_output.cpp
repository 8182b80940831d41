#include <cstdio>
int main() { for (int i = 0; i < 100000; i++) std::printf("%d\n", i); }
