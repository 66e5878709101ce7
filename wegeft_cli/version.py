"""The version of the distribution, alone in a file so that a build reads it without imports."""

VERSION = "0.2.0"
