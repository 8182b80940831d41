// differential: {"args": ["a b", ""], "env": {"MINE": "1"}}
console.log(process.argv.slice(2), process.env.MINE, process.env.HOME, process.cwd(), require("path").basename(__filename));
