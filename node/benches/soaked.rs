//! What the soak is made of: the apps, those who ask them, and what is made of the samples.

pub(crate) mod client;
pub(crate) mod fleet;
pub(crate) mod verdict;
