//! What a figure shall be, beside what it is.

use std::fmt;

/// What a figure shall be.
#[derive(Clone, Copy)]
pub(crate) enum Aim {
    AtLeast(f64),
    AtMost(f64),
}

impl Aim {
    /// The aim, and whether `value` meets it. `unit` stands behind the number.
    pub(crate) fn judge(self, value: f64, unit: &'static str) -> Judged {
        Judged { aim: self, value, unit }
    }
}

/// An aim and what came.
pub(crate) struct Judged {
    aim: Aim,
    value: f64,
    unit: &'static str,
}

impl fmt::Display for Judged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { aim, value, unit } = self;
        let (word, number, met) = match aim {
            Aim::AtLeast(number) => ("at least", number, value >= number),
            Aim::AtMost(number) => ("at most", number, value <= number),
        };
        // A figure that could not be taken is NaN, which meets nothing.
        write!(f, "aim {word} {number}{unit}: {}", if met { "met" } else { "MISSED" })
    }
}
