// Instantiates two templates for each, a thousand deep and no two the same.
template <unsigned long long path, int depth>
struct Node {
    static constexpr unsigned long long value =
        Node<path * 2, depth - 1>::value + Node<path * 2 + 1, depth - 1>::value;
};
template <unsigned long long path>
struct Node<path, 0> {
    static constexpr unsigned long long value = 1;
};
int main() { return Node<1, 60>::value; }
