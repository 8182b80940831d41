class A { #x = 1; static s = 2; get x() { return this.#x; } *[Symbol.iterator]() { yield* [1, 2]; } }
console.log(new A().x, A.s, [...new A()], new A());
