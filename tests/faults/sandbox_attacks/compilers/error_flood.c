/* Has the compiler complain a million times. */
#define A(x) x x x x x x x x x x
#define W _Pragma("message(\"flood flood flood flood\")") undeclared_type variable;
A(A(A(A(A(A(W))))))
#error end
