"""`python -m client` is `cloister join`."""

import sys

from cloister import main

if __name__ == "__main__":
    sys.argv.insert(1, "join")
    main()
