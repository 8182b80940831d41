<?php function f() { throw new DomainException("bad"); } echo "before\n"; f();
