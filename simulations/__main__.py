"""`python -m simulations` is `cloister simulate`."""

import sys

from cloister import main

if __name__ == "__main__":
    sys.argv.insert(1, "simulate")
    main()
