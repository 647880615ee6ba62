//! The behaviour of a node, seen from outside.
