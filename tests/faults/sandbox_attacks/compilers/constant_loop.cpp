// Computes for ever while it is compiled.
template <int level>
constexpr unsigned long long spin(unsigned long long count) {
    unsigned long long sum = 0;
    for (unsigned long long index = 0; index < 200000; index++) sum += index ^ count;
    return sum;
}
template <int number>
struct Work {
    static constexpr unsigned long long value = spin<number>(number) + Work<number - 1>::value;
};
template <>
struct Work<0> {
    static constexpr unsigned long long value = 0;
};
int main() { return Work<800>::value; }
