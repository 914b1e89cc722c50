"""`python -m cloister` is `cloister`."""

from cloister import main

if __name__ == "__main__":
    main()
