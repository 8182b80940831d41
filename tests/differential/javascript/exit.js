console.log("told");
process.exit(5);
