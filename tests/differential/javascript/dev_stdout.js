const fs = require("fs");
console.log("a");
fs.writeFileSync("/dev/stdout", "b\n");
console.log("c");
