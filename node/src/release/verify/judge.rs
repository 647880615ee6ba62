//! Whether an artifact's signatures suffice: one after the other is offered, until they do.
//!
//! So it does not matter how many others there are: none of them stands in the way of a good one, each costs a bounded
//! check, and whoever offers them can stop at the first moment that the policy is met.

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use selvage_config::key::{KeyId, PublicKey};
use selvage_config::oci;
use selvage_config::signature::{BUNDLE_BYTES_MAX, Envelope, PREDICATE_SIGN, Statement};
use selvage_config::{AppName, Digest};
use serde::Serialize;

use super::keyless::{Claim, Material, Proved};
use super::policy::{Demand, Policy, Rule, Signer, Who};
use super::signature::{self, Made, SignatureError};
use super::{Rejections, Terms, VerifyError};
use crate::release::fetch::Candidate;

/// Rejections that are kept to be told. The others are counted.
const REJECTIONS_KEPT: usize = 32;

/// What the policy says of one artifact, so far.
pub struct Judge<'t> {
    terms: &'t Terms,
    /// Its place in the policy, and the rule. None: files of the operator.
    rule: Option<(usize, &'t Rule)>,
    digest: Digest,
    /// Who signed.
    signed: Principals,
    /// Who attested, for each demanded attestation.
    attested: Vec<Principals>,
    proofs: Vec<Proof>,
    kept: Vec<Candidate>,
    rejections: Vec<(Digest, SignatureError)>,
    looked: usize,
    has_bundle: bool,
}

/// Each key or identity that was seen, and which signers of the policy it is.
#[derive(Debug, Clone, Default)]
struct Principals(BTreeMap<String, BTreeSet<usize>>);

impl Principals {
    fn add(&mut self, principal: String, signer: usize) {
        self.0.entry(principal).or_default().insert(signer);
    }

    /// How many different signers there are, each a different key or identity: somebody who fits two of them is one.
    /// (The largest matching, by augmenting paths.)
    fn count(&self) -> usize {
        fn place<'p>(
            wanted: &'p BTreeSet<usize>,
            taken: &mut BTreeMap<usize, &'p BTreeSet<usize>>,
            tried: &mut BTreeSet<usize>,
        ) -> bool {
            for signer in wanted {
                if !tried.insert(*signer) {
                    continue;
                }
                let other = taken.get(signer).copied();
                if other.is_none_or(|other| place(other, taken, tried)) {
                    taken.insert(*signer, wanted);
                    return true;
                }
            }
            false
        }
        let mut taken = BTreeMap::new();
        self.0.values().filter(|wanted| place(wanted, &mut taken, &mut BTreeSet::new())).count()
    }
}

/// A verdict that stands: why an artifact may run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// The artifact.
    pub digest: Digest,
    /// Which rule of the policy decided, from 0. None: no policy was asked.
    pub rule: Option<usize>,
    /// What met it.
    pub proofs: Vec<Proof>,
}

/// One signature or attestation that counted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Proof {
    /// The bundle.
    pub bundle: Digest,
    /// The policy's signers that it counts for.
    pub signers: Vec<String>,
    /// What it says.
    pub predicate_type: String,
    /// The key that made it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<KeyId>,
    /// In whose name it was made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
    /// Who vouches for the name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub issuer: Option<String>,
    /// Whether a transparency log was seen to have it.
    pub log: bool,
    /// When it was made, as a log or a timestamp authority says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signed_at: Option<String>,
}

/// Who made a bundle, as far as it was verified, for one signer of the policy.
struct Author {
    key: Option<KeyId>,
    claim: Option<Claim>,
    proved: Proved,
}

impl Author {
    /// Who it is, whatever the policy calls them.
    fn principal(&self) -> String {
        let key = self.key.map(|key| key.to_string());
        let claim = || self.claim.as_ref().map(|claim| format!("{} by {}", claim.identity, claim.issuer));
        key.or_else(claim).unwrap_or_default()
    }
}

/// What a signer stands for in a rule.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Signature,
    /// Of the demand with this number.
    Attestation(usize),
}

impl<'t> Judge<'t> {
    /// Nothing has been offered yet.
    ///
    /// # Errors
    /// [`VerifyError::Revoked`]; [`VerifyError::NoRule`] if no rule covers the app.
    pub fn new(terms: &'t Terms, app: &AppName, repository: &str, digest: Digest) -> Result<Self, VerifyError> {
        if terms.revoked.digests.contains(&digest) {
            return Err(VerifyError::Revoked(digest));
        }
        let rule = match &terms.policy {
            Policy::LocalFiles => None,
            Policy::Rules(rules) => {
                let covers = |(_, rule): &(usize, &Rule)| rule.document.covers(app.as_str(), repository);
                let no_rule = || VerifyError::NoRule { app: app.clone(), repository: repository.to_owned() };
                Some(rules.iter().enumerate().find(covers).ok_or_else(no_rule)?)
            }
        };
        let demands = rule.map_or(0, |(_, rule)| rule.demands.len());
        Ok(Self {
            terms,
            rule,
            digest,
            signed: Principals::default(),
            attested: vec![Principals::default(); demands],
            proofs: Vec::new(),
            kept: Vec::new(),
            rejections: Vec::new(),
            looked: 0,
            has_bundle: false,
        })
    }

    /// Looks at one candidate. Whether the policy is met now.
    pub fn offer(&mut self, candidate: &Candidate) -> bool {
        if self.is_met() || self.kept.iter().any(|kept| kept.layer.digest == candidate.layer.digest) {
            return self.is_met();
        }
        self.looked += 1;
        match self.check(candidate) {
            Ok(proof) => {
                self.proofs.push(proof);
                self.kept.push(candidate.clone());
            }
            Err(why) if self.rejections.len() < REJECTIONS_KEPT => {
                self.rejections.push((candidate.layer.digest, why));
            }
            Err(_) => {}
        }
        self.is_met()
    }

    /// Whether nothing more is needed.
    pub fn is_met(&self) -> bool {
        let Some((_, rule)) = self.rule else { return true };
        let attested = rule.demands.iter().zip(&self.attested);
        self.signed.count() >= rule.document.threshold
            && attested.into_iter().all(|(demand, who)| who.count() >= demand.document.threshold)
    }

    /// Whether cosign 2's form is worth a look: it is allowed, and nothing newer was there.
    pub fn wants_legacy(&self) -> bool {
        !self.has_bundle && self.rule.is_some_and(|(_, rule)| rule.document.legacy_signatures)
    }

    /// The candidates that counted: all that is needed to come to the same verdict again.
    pub fn kept(&self) -> &[Candidate] {
        &self.kept
    }

    /// The verdict.
    ///
    /// # Errors
    /// What is missing, and why what was there did not count.
    pub fn verdict(self) -> Result<Verdict, VerifyError> {
        if self.is_met() {
            let rule = self.rule.map(|(index, _)| index);
            return Ok(Verdict { digest: self.digest, rule, proofs: self.proofs });
        }
        if self.looked == 0 {
            return Err(VerifyError::Unsigned);
        }
        let why = Rejections { kept: self.rejections, looked: self.looked };
        let Some((_, rule)) = self.rule else { return Err(VerifyError::Unsigned) };
        if self.signed.count() < rule.document.threshold {
            let (found, needed) = (self.signed.count(), rule.document.threshold);
            if found == 0 && needed == 1 {
                return Err(VerifyError::Untrusted { found: why.looked, why });
            }
            return Err(VerifyError::Short { what: "signature".to_owned(), found, needed, why });
        }
        let demands = rule.demands.iter().zip(&self.attested);
        let short = demands.into_iter().find(|(demand, who)| who.count() < demand.document.threshold);
        let (what, found, needed) = short.map_or((String::new(), 0, 0), |(demand, who)| {
            (demand.document.predicate_type.clone(), who.count(), demand.document.threshold)
        });
        Err(VerifyError::Short { what, found, needed, why })
    }

    /// Every signer of the rule with what it stands for.
    fn signers(rule: &'t Rule) -> impl Iterator<Item = (Role, usize, &'t Signer)> {
        let own = rule.signers.iter().enumerate().map(|(index, signer)| (Role::Signature, index, signer));
        let demanded = rule.demands.iter().enumerate().flat_map(|(number, demand)| {
            let role = Role::Attestation(number);
            demand.signers.iter().enumerate().map(move |(index, signer)| (role, index, signer))
        });
        own.chain(demanded)
    }

    fn check(&mut self, candidate: &Candidate) -> Result<Proof, SignatureError> {
        let Some((_, rule)) = self.rule else { return Err(SignatureError::Key) };
        if candidate.bytes.len() > BUNDLE_BYTES_MAX {
            return Err(SignatureError::Large);
        }
        if candidate.layer.media_type == oci::SIMPLE_SIGNING {
            return self.check_legacy(rule, candidate);
        }
        self.has_bundle = true;
        if candidate.layer.media_type != oci::BUNDLE {
            return Err(SignatureError::MediaType);
        }
        let (envelope, made) = signature::read(&candidate.bytes)?;
        let mut authors = Vec::new();
        let mut why = match made {
            Made::ByKey => SignatureError::OnlyIdentities,
            Made::ByCertificate => SignatureError::OnlyKeys,
        };
        let material = std::cell::OnceCell::new();
        for (role, index, signer) in Self::signers(rule) {
            let author = match (&signer.who, made) {
                (Who::Key(key), Made::ByKey) => self.by_key(signer, key, &envelope, candidate),
                (Who::Identity { .. }, Made::ByCertificate) => {
                    let read = material.get_or_init(|| Material::read(&candidate.bytes));
                    match read {
                        Ok(material) => self.by_identity(signer, material),
                        Err(error) => Err(SignatureError::Sigstore(error.to_string())),
                    }
                }
                _ => continue,
            };
            match author {
                Ok(author) => authors.push((role, index, signer, author)),
                Err(error) => why = weightier(why, error),
            }
        }
        if authors.is_empty() {
            return Err(why);
        }
        let statement = signature::statement(&envelope, self.digest)?;
        self.count(rule, candidate, &statement, authors)
    }

    /// Counts a statement for those whose word on it counts.
    fn count(
        &mut self,
        rule: &Rule,
        candidate: &Candidate,
        statement: &Statement,
        authors: Vec<(Role, usize, &Signer, Author)>,
    ) -> Result<Proof, SignatureError> {
        // cosign itself takes any attestation for a signature; "the scan failed" must not make an artifact run.
        let is_signature = statement.predicate_type == PREDICATE_SIGN;
        let mut why = SignatureError::Attestation(statement.predicate_type.chars().take(100).collect());
        if is_signature {
            annotated(rule, statement, self.digest)?;
            why = SignatureError::Key;
        }
        let mut counted: Option<Proof> = None;
        for (role, index, signer, author) in authors {
            let fits = match role {
                Role::Signature => is_signature,
                Role::Attestation(number) => match demanded(&rule.demands[number], statement) {
                    Ok(fits) => fits,
                    Err(error) => {
                        why = error;
                        false
                    }
                },
            };
            if !fits {
                continue;
            }
            let principal = author.principal();
            match role {
                Role::Signature => self.signed.add(principal, index),
                Role::Attestation(number) => self.attested[number].add(principal, index),
            }
            let proof = counted.get_or_insert_with(|| Proof {
                bundle: candidate.layer.digest,
                signers: Vec::new(),
                predicate_type: statement.predicate_type.clone(),
                key: author.key,
                identity: author.claim.as_ref().map(|claim| claim.identity.clone()),
                issuer: author.claim.as_ref().map(|claim| claim.issuer.clone()),
                log: false,
                signed_at: None,
            });
            proof.log |= author.proved.log;
            proof.signed_at = proof.signed_at.take().or(author.proved.signed_at);
            proof.signers.push(signer.title.clone());
        }
        counted.ok_or(why)
    }

    fn by_key(
        &self,
        signer: &Signer,
        key: &PublicKey,
        envelope: &Envelope,
        candidate: &Candidate,
    ) -> Result<Author, SignatureError> {
        if !signature::is_by(envelope, key) {
            return Err(SignatureError::Key);
        }
        let id = key.id();
        if self.terms.revoked.keys.contains(&id) {
            return Err(SignatureError::Revoked(format!("key {id}")));
        }
        let proved = match &signer.authorities {
            Some(authorities) if signer.log => {
                Material::read(&candidate.bytes)?.verify_logged_key(authorities, self.digest, key)?
            }
            _ => Proved::default(),
        };
        Ok(Author { key: Some(id), claim: None, proved })
    }

    fn by_identity(&self, signer: &Signer, material: &Material) -> Result<Author, SignatureError> {
        let (Who::Identity { identity, issuer }, Some(authorities)) = (&signer.who, &signer.authorities) else {
            return Err(SignatureError::OnlyKeys);
        };
        let is_trusted = |claim: &Claim| identity.fits(&claim.identity) && issuer.fits(&claim.issuer);
        let stranger = |Claim { identity, issuer }: Claim| SignatureError::Identity { identity, issuer };
        let claim = material.claim()?;
        if !is_trusted(&claim) {
            return Err(stranger(claim));
        }
        let proofs = (signer.log, signer.certificate_log);
        let (claim, proved) = material.verify_certificate(authorities, self.digest, proofs)?;
        if !is_trusted(&claim) {
            return Err(stranger(claim));
        }
        if self.terms.revoked.identities.contains(&claim.identity) {
            return Err(SignatureError::Revoked(claim.identity));
        }
        Ok(Author { key: None, claim: Some(claim), proved })
    }

    /// Whoever hides the bundles must not gain by it: the old form counts only where the operator allows it.
    fn check_legacy(&mut self, rule: &Rule, candidate: &Candidate) -> Result<Proof, SignatureError> {
        if !self.wants_legacy() {
            return Err(SignatureError::Legacy);
        }
        // It carries no proof of a log.
        let keys =
            rule.signers.iter().enumerate().filter(|(_, signer)| !signer.log).filter_map(
                |(index, signer)| match &signer.who {
                    Who::Key(key) if !self.terms.revoked.keys.contains(&key.id()) => Some((index, signer, key)),
                    _ => None,
                },
            );
        let keys: Vec<(usize, &Signer, &PublicKey)> = keys.collect();
        let (key, remarks) = signature::legacy(candidate, self.digest, keys.iter().map(|(.., key)| *key))?;
        let is_there = |(name, value): &(&String, &String)| remarks.get(name.as_str()) == Some(&value.as_str().into());
        if let Some((name, _)) = rule.document.annotations.iter().find(|wanted| !is_there(wanted)) {
            return Err(SignatureError::Annotation(name.clone()));
        }
        let by: Vec<_> = keys.iter().filter(|(.., own)| *own == key).collect();
        by.iter().for_each(|(index, ..)| self.signed.add(key.id().to_string(), *index));
        Ok(Proof {
            bundle: candidate.layer.digest,
            signers: by.iter().map(|(_, signer, _)| signer.title.clone()).collect(),
            predicate_type: selvage_config::signature::SIMPLE_SIGNING_TYPE.to_owned(),
            key: Some(key.id()),
            identity: None,
            issuer: None,
            log: false,
            signed_at: None,
        })
    }
}

/// Whether a signature carries what the rule wants under each.
fn annotated(rule: &Rule, statement: &Statement, digest: Digest) -> Result<(), SignatureError> {
    let hex = digest.hex();
    let about = || statement.subject.iter().filter(|subject| subject.digest.get("sha256") == Some(&hex));
    let is_there = |(name, value): &(&String, &String)| {
        about().any(|subject| subject.annotations.get(name.as_str()) == Some(*value))
    };
    match rule.document.annotations.iter().find(|wanted| !is_there(wanted)) {
        Some((name, _)) => Err(SignatureError::Annotation(name.clone())),
        None => Ok(()),
    }
}

/// Whether a statement is the demanded attestation. An error: it is one, and says something else.
fn demanded(demand: &Demand, statement: &Statement) -> Result<bool, SignatureError> {
    if statement.predicate_type != demand.document.predicate_type {
        return Ok(false);
    }
    for (pointer, expected) in &demand.document.says {
        let actual = statement.predicate.pointer(pointer);
        if actual.and_then(serde_json::Value::as_str) != Some(expected) {
            let actual = actual.map_or("nothing".to_owned(), |value| value.to_string().chars().take(200).collect());
            return Err(SignatureError::Says { what: pointer.clone(), actual, expected: expected.clone() });
        }
    }
    Ok(true)
}

/// The reason that says more: who came close is told why it was not enough.
fn weightier(one: SignatureError, other: SignatureError) -> SignatureError {
    let weight = |error: &SignatureError| match error {
        SignatureError::OnlyIdentities | SignatureError::OnlyKeys => 0,
        SignatureError::Key | SignatureError::Identity { .. } => 1,
        _ => 2,
    };
    if weight(&other) >= weight(&one) { other } else { one }
}
