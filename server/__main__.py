"""`python -m server` is `cloister serve`."""

import sys

from cloister import main

if __name__ == "__main__":
    sys.argv.insert(1, "serve")
    main()
