const fs = require("fs");
fs.writeFileSync("a", "x"); fs.appendFileSync("a", "y"); fs.mkdirSync("d/e", { recursive: true });
console.log(fs.readFileSync("a", "utf8"), fs.readdirSync(".").sort(), fs.existsSync("none"));
fs.readFileSync("none");
