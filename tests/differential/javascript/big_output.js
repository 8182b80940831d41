console.log([...Array(30000).keys()].join("\n"));
