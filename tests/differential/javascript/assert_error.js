require("assert").deepStrictEqual([1, 2], [1, 3]);
