exit 300;
