"""What comes with the package to try it: trained miniatures, the scenes they paint, a checker, the demonstration."""
