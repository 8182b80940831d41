#include <iostream>
struct A { const char *n; ~A() { std::cout << n << std::endl; } };
A a{"first"}, b{"second"};
int main() { static A c{"third"}; std::exit(5); }
