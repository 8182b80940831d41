const { execSync, spawnSync } = require("child_process");
console.log(execSync("echo hi | tr a-z A-Z").toString(), spawnSync("sh", ["-c", "exit 3"]).status, spawnSync("sh", ["-c", "kill -9 $$"]).signal);
