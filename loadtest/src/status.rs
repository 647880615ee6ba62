//! The statuses that a request may be answered with: `200`, `2xx`, `401,403`, `200-299`.

use std::fmt;
use std::str::FromStr;

/// The smallest and the largest status (RFC 9110 15).
const STATUS_MIN: u16 = 100;
const STATUS_MAX: u16 = 599;

/// A set of HTTP statuses, written as `200`, `2xx`, `200-204` or several of them with commas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatusSet {
    /// Inclusive ranges in the order given.
    ranges: Vec<(u16, u16)>,
}

/// A text that names no set of statuses.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{part:?} is not a status: write 200, 2xx, 200-204 or several of them with commas")]
pub struct StatusSetError {
    part: String,
}

impl StatusSet {
    /// Whether `status` is in the set.
    pub fn contains(&self, status: u16) -> bool {
        self.ranges.iter().any(|&(first, last)| (first..=last).contains(&status))
    }

    /// The answers that mean success, 200 to 299.
    pub fn success() -> StatusSet {
        StatusSet { ranges: vec![(200, 299)] }
    }
}

impl FromStr for StatusSet {
    type Err = StatusSetError;

    fn from_str(text: &str) -> Result<StatusSet, StatusSetError> {
        let ranges = text.split(',').map(range).collect::<Result<_, _>>()?;
        Ok(StatusSet { ranges })
    }
}

fn range(part: &str) -> Result<(u16, u16), StatusSetError> {
    let wrong = || StatusSetError { part: part.to_owned() };
    let part = part.trim();
    if let Some(class) = part.strip_suffix("xx") {
        let class: u16 = class.parse().map_err(|_| wrong())?;
        return if (1..=5).contains(&class) { Ok((class * 100, class * 100 + 99)) } else { Err(wrong()) };
    }
    let (first, last) = part.split_once('-').unwrap_or((part, part));
    let number = |text: &str| text.trim().parse::<u16>().map_err(|_| wrong());
    let (first, last) = (number(first)?, number(last)?);
    if (STATUS_MIN..=STATUS_MAX).contains(&first) && (first..=STATUS_MAX).contains(&last) {
        Ok((first, last))
    } else {
        Err(wrong())
    }
}

impl fmt::Display for StatusSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, &(first, last)) in self.ranges.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            match (first, last) {
                (first, last) if first == last => write!(f, "{comma}{first}")?,
                (first, last) if first % 100 == 0 && last == first + 99 => write!(f, "{comma}{}xx", first / 100)?,
                (first, last) => write!(f, "{comma}{first}-{last}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_holds_what_it_names_and_nothing_else() {
        let set: StatusSet = "2xx, 304,401-403".parse().unwrap();
        for status in [200, 204, 299, 304, 401, 402, 403] {
            assert!(set.contains(status), "{status}");
        }
        for status in [199, 300, 303, 305, 400, 404, 500] {
            assert!(!set.contains(status), "{status}");
        }
    }

    #[test]
    fn a_set_is_written_as_it_is_read() {
        for text in ["200", "2xx", "401,403", "200-204,3xx", "500-599,200"] {
            let set: StatusSet = text.parse().unwrap();
            assert_eq!(set.to_string().parse::<StatusSet>().unwrap(), set);
        }
        assert_eq!("2xx".parse::<StatusSet>().unwrap(), StatusSet::success());
    }

    #[test]
    fn what_is_no_status_is_refused_by_name() {
        for text in ["", "20", "99", "600", "0xx", "6xx", "xx", "204-200", "200,", "2x", "200-", "ok", "-200", "65536"]
        {
            let error = text.parse::<StatusSet>().unwrap_err();
            assert!(error.to_string().contains("is not a status"), "{text}: {error}");
        }
    }
}
