/* Doubles a text forty times. */
#define A(x) x x
#define B(x) A(A(A(A(A(x)))))
#define C(x) B(B(B(B(x))))
#define D(x) C(C(x))
int main(void) { return 0 D(+ 1); }
