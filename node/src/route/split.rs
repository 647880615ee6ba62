//! A second release of an app beside its first, for a part of the visitors.
//!
//! A visitor is known by address, header field or cookie, and stays where the hash of that and of the release puts it:
//! raising the percentage moves visitors to the second release, and none back. A request that names one of the two
//! releases gets that one where the operator lets it: beside a release for 0 of 100, which nobody could try otherwise, and
//! where the split says so. Elsewhere the field says nothing, so that no client leaves the half of an experiment that it
//! was put into.

use std::net::IpAddr;
use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue, header};
use selvage_config::plan::RELEASE_FIELD;
use selvage_config::release::ReleaseId;
use selvage_config::rollout::{SplitKey, is_among};

use super::ActiveApp;

/// By which a request chooses, and an answer tells, the release.
pub(crate) const RELEASE: HeaderName = HeaderName::from_static(RELEASE_FIELD);

/// The second release of an app.
#[derive(Debug, Clone)]
pub struct Second {
    /// It.
    pub app: Arc<ActiveApp>,
    /// Its name.
    pub release: ReleaseId,
    /// How many of a hundred visitors it serves.
    pub percent: u8,
    /// What keeps a visitor at one release.
    pub key: SplitKey,
    /// Whether a request may name its release although the second one has visitors of its own.
    pub named: bool,
}

/// Who asks, as far as a split looks at it.
#[derive(Debug, Clone, Copy)]
pub struct Visitor<'r> {
    /// The release that the request names.
    pub wanted: Option<&'r HeaderValue>,
    /// The fields of the request.
    pub fields: &'r HeaderMap,
    /// The client's address.
    pub address: IpAddr,
}

impl Second {
    /// Whether this visitor is served by the second release.
    pub(super) fn takes(&self, first: &ActiveApp, visitor: Visitor<'_>) -> bool {
        if let Some(wanted) = visitor.wanted.filter(|_| self.named || self.percent == 0) {
            if names(wanted, &self.release) {
                return true;
            }
            if first.release().is_some_and(|release| names(wanted, release)) {
                return false;
            }
            // A release that is not in the plan: the field says nothing.
        }
        let told = match &self.key {
            SplitKey::Client => None,
            SplitKey::Header(name) => visitor.fields.get(name.as_str()).map(HeaderValue::as_bytes),
            SplitKey::Cookie(name) => cookie(visitor.fields, name),
        };
        let release = self.release.to_string();
        match told {
            Some(key) => is_among(&release, key, self.percent),
            None => match visitor.address.to_canonical() {
                IpAddr::V4(address) => is_among(&release, &address.octets(), self.percent),
                IpAddr::V6(address) => is_among(&release, &address.octets(), self.percent),
            },
        }
    }
}

/// Takes the release that a request names out of its fields. Two wishes are none: which one was meant?
pub(crate) fn take_wanted(fields: &mut HeaderMap) -> Option<HeaderValue> {
    let mut values = fields.get_all(RELEASE).iter();
    let wanted = values.next()?.clone();
    let is_one = values.next().is_none();
    fields.remove(RELEASE);
    is_one.then_some(wanted)
}

/// Whether a field's value is `app@number` or the number of `release`.
fn names(value: &HeaderValue, release: &ReleaseId) -> bool {
    let Ok(text) = value.to_str() else { return false };
    let number = text.strip_prefix(release.app.as_str()).and_then(|rest| rest.strip_prefix('@')).unwrap_or(text);
    number.parse() == Ok(release.number)
}

/// The value of a cookie (RFC 6265 5.4), the first of its name.
fn cookie<'f>(fields: &'f HeaderMap, name: &str) -> Option<&'f [u8]> {
    let pairs = fields.get_all(header::COOKIE).iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b';'));
    pairs.map(<[u8]>::trim_ascii).find_map(|pair| pair.strip_prefix(name.as_bytes())?.strip_prefix(b"="))
}

#[cfg(test)]
mod tests {
    use super::super::tests::fixed_app;
    use super::*;

    fn second(percent: u8, key: &str) -> Second {
        let app = Arc::new(fixed_app("hello", &[], &["/..."]));
        Second { app, release: "hello@4".parse().unwrap(), percent, key: key.parse().unwrap(), named: false }
    }

    fn first() -> ActiveApp {
        let mut app = fixed_app("hello", &[], &["/..."]);
        app.release = Some("hello@3".parse().unwrap());
        app
    }

    fn takes(second: &Second, fields: &[(&'static str, &str)], address: &str) -> bool {
        let fields: HeaderMap =
            fields.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap())).collect();
        second.takes(
            &first(),
            Visitor { wanted: fields.get(RELEASE), fields: &fields, address: address.parse().unwrap() },
        )
    }

    #[test]
    fn a_request_may_name_its_release_even_one_that_nobody_else_meets() {
        for (value, wanted) in
            [("hello@4", true), ("4", true), ("hello@3", false), ("3", false), ("hello@5", false), ("x", false)]
        {
            assert_eq!(takes(&second(0, "client"), &[("selvage-release", value)], "192.0.2.1"), wanted, "{value}");
        }
        let open = Second { named: true, ..second(100, "client") };
        assert!(!takes(&open, &[("selvage-release", "3")], "192.0.2.1"));
        assert!(takes(&open, &[("selvage-release", "9")], "192.0.2.1"));
    }

    #[test]
    fn no_request_names_its_release_where_the_operator_does_not_let_it() {
        for percent in [1, 50, 100] {
            for n in 0..50 {
                let address = format!("192.0.2.{n}");
                let put = takes(&second(percent, "client"), &[], &address);
                for wanted in ["3", "4", "hello@4"] {
                    assert_eq!(takes(&second(percent, "client"), &[("selvage-release", wanted)], &address), put);
                }
            }
        }
    }

    #[test]
    fn a_wish_is_taken_out_of_the_fields_and_two_are_none() {
        let of = |values: &[&'static str]| {
            let mut fields = HeaderMap::new();
            for value in values {
                fields.append(RELEASE, HeaderValue::from_static(value));
            }
            let wanted = take_wanted(&mut fields);
            assert!(!fields.contains_key(RELEASE));
            wanted
        };
        assert_eq!(of(&["4"]), Some(HeaderValue::from_static("4")));
        assert_eq!((of(&[]), of(&["4", "3"]), of(&["4", "4"])), (None, None, None));
    }

    #[test]
    fn a_visitor_stays_where_it_is_when_the_share_grows() {
        let mut moved = 0;
        for n in 0..200 {
            let (value, address) = (format!("a=b; sid=visitor-{n}"), format!("192.0.2.{n}"));
            for (key, fields) in [("cookie:sid", vec![("cookie", value.as_str())]), ("client", vec![])] {
                let at: Vec<bool> =
                    [0, 10, 50, 100].map(|percent| takes(&second(percent, key), &fields, &address)).into();
                assert!(!at[0] && at[3] && at.is_sorted(), "{key} {n}: {at:?}");
                moved += usize::from(at[1]);
            }
        }
        assert!((15..75).contains(&moved), "{moved} of 400 are among the first tenth");
    }

    #[test]
    fn the_key_decides_and_not_where_it_comes_from() {
        let by_key = |key: &str, fields: &[(&'static str, &str)]| {
            ["192.0.2.1", "198.51.100.7", "::1"].map(|address| takes(&second(50, key), fields, address))
        };
        for n in 0..20 {
            let user = format!("user-{n}");
            let [a, b, c] = by_key("header:x-user", &[("x-user", &user)]);
            assert!(a == b && b == c);
        }
        // An address is the same however it is written.
        assert_eq!(
            takes(&second(50, "client"), &[], "192.0.2.1"),
            takes(&second(50, "client"), &[], "::ffff:192.0.2.1")
        );
    }
}
