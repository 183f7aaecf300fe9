"""`python launch/torture`."""

from launch.torture.experiment import main

main()
