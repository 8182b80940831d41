console.log([1, , 3], { a: { b: { c: { d: 1 } } } }, new Map([[1, 2]]), new Set("ab"), 0.1 + 0.2, 2n ** 70n, -0, null, undefined, Symbol("s"), /x/g, new Date(0), [1, 10, 2].sort(), "é✓".length, NaN);
