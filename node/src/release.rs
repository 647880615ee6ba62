//! A release on its way to serving: [`plan`] says what shall run, [`fetch`] brings it, [`verify`] decides whether a
//! trusted key signed it, [`compile`] makes code of it, [`activate`] swaps it in.
//!
//! [`origin`] is the control plane as a node reaches it, [`neighbours`] are the peers beside it, [`ledger`] what makes sure that a plan is new, [`trial`] what a
//! node does with a release that brings it down, [`state`] what it keeps to do without the control plane.

pub mod plan;

pub mod fetch;

pub mod verify;

pub mod compile;

pub mod activate;

pub mod ledger;
pub mod neighbours;
pub mod origin;
pub mod state;
pub mod trial;
