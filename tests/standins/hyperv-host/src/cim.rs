//! The host as a [`Cim`]: what a transport would show of it.

use crate::embedded;
use crate::schema::{Class, Schema};
use crate::services::arguments;
use crate::world::World;
use crate::wql::{Query, known_class};
use vmtide_cim::{
    Association, Cim, CimError, CimInstance, CimValue, MethodOutput, ObjectPath, Result,
    VIRTUALIZATION_NAMESPACE,
};

/// How answers look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AnswerForm {
    /// As over COM: every value with its type, every instance with its path.
    #[default]
    Typed,
    /// As over WS-Management: every scalar is text, an array of one element is that element, an empty one is
    /// missing, and instances that a query finds have no paths.
    Texts,
}

/// A connection to the host.
#[derive(Clone)]
pub(crate) struct Connection {
    pub(crate) world: World,
    pub(crate) form: AnswerForm,
    pub(crate) peer: String,
}

impl Cim for Connection {
    fn peer(&self) -> &str {
        &self.peer
    }

    fn query(&self, namespace: &str, wql: &str) -> Result<Vec<CimInstance>> {
        self.enter()?;
        match Query::parse(wql)? {
            Query::Select { columns, class, condition } => {
                let class = self.class_in(namespace, &class)?;
                let state = self.world.lock();
                if state.faults.nothing_shown && class.namespace == VIRTUALIZATION_NAMESPACE {
                    return Ok(Vec::new());
                }
                let found = state.family(class.name);
                drop(state);
                let found = found.into_iter().filter(|instance| {
                    condition.as_ref().is_none_or(|condition| condition.holds(instance))
                });
                let pick = |mut instance: CimInstance| {
                    instance.properties.retain(|(name, _)| {
                        columns.is_empty() || columns.iter().any(|column| column == name)
                    });
                    self.formed(instance, true)
                };
                Ok(found.map(pick).collect())
            }
            Query::Related { path, ends, class, result_class, role } => {
                let how = Association { class, result_class, role };
                if ends { self.associators(&path, &how) } else { self.references(&path, &how) }
            }
        }
    }

    fn get(&self, path: &ObjectPath) -> Result<CimInstance> {
        self.enter()?;
        let class = self.class_in(&path.namespace, &path.class)?;
        if !class.is_path(path) {
            return Err(not_found(path, "the keys are not those of the class (0x80041008)"));
        }
        let found = self.world.lock().instance_at(path);
        let found = found.ok_or_else(|| not_found(path, "not found (0x80041002)"))?;
        Ok(self.formed(found, false))
    }

    fn associators(&self, path: &ObjectPath, how: &Association) -> Result<Vec<CimInstance>> {
        self.check_association(path, how)?;
        let found = self.world.lock().associators_of(path, how);
        Ok(found.into_iter().map(|instance| self.formed(instance, false)).collect())
    }

    fn references(&self, path: &ObjectPath, how: &Association) -> Result<Vec<CimInstance>> {
        self.check_association(path, how)?;
        let found = self.world.lock().references_of(path, how);
        Ok(found.into_iter().map(|instance| self.formed(instance, false)).collect())
    }

    fn invoke(
        &self,
        path: &ObjectPath,
        method: &str,
        parameters: &[(&str, CimValue)],
    ) -> Result<MethodOutput> {
        self.enter()?;
        let class = self.class_in(&path.namespace, &path.class)?;
        if self.lost(method, false) {
            return Err(self.lost_answer());
        }
        let (known, arguments) = arguments::check(class, method, parameters)?;
        let mut state = self.world.lock();
        if !class.is_path(path) || state.instance_at(path).is_none() {
            return Err(not_found(path, "not found (0x80041002)"));
        }
        if let Some(name) = state.faults.unknown_in(parameters) {
            return Err(CimError::Fault {
                action: format!("{}.{method}", class.name),
                detail: format!("a parameter holds {name}, which this version does not know"),
                code: Some(0x8004_102F),
            });
        }
        let late = state.faults.late.clone().filter(|(name, _)| name == method);
        let answer = match late {
            Some((_, ms)) => state.begin_late(path, method, &arguments, ms),
            None => state.call(path, method, &arguments)?,
        };
        state.note(format!("{method} answered {}", answer.code));
        drop(state);
        let mut output = CimInstance::new("");
        for parameter in known.parameters.iter().filter(|parameter| parameter.is_output) {
            let value = answer.parameters.iter().find(|(name, _)| *name == parameter.name);
            let value = value.map_or(CimValue::Null, |(_, value)| value.clone());
            output.properties.push((parameter.name.to_owned(), value));
        }
        if self.lost(method, true) {
            return Err(self.lost_answer());
        }
        let parameters = self.formed(output, false);
        Ok(MethodOutput { return_value: answer.code, parameters })
    }
}

impl Connection {
    /// A call begins: time goes on, and what is due is done.
    fn enter(&self) -> Result<()> {
        let mut state = self.world.lock();
        state.now_ms += state.options.tick_ms;
        state.catch_up();
        if state.faults.access_denied {
            return Err(CimError::Denied {
                peer: self.peer.clone(),
                detail: "access is denied (0x80070005)".into(),
            });
        }
        Ok(())
    }

    fn class_in(&self, namespace: &str, name: &str) -> Result<&'static Class> {
        let class = known_class(name)?;
        let plain = namespace.replace('/', "\\");
        if plain.is_empty() || plain.eq_ignore_ascii_case(class.namespace) {
            return Ok(class);
        }
        let known = Schema::get().classes().any(|c| c.namespace.eq_ignore_ascii_case(&plain));
        Err(CimError::NotFound {
            what: format!("{name} in {namespace}"),
            detail: if known {
                "invalid class (0x80041010)"
            } else {
                "invalid namespace (0x8004100E)"
            }
            .into(),
        })
    }

    fn check_association(&self, path: &ObjectPath, how: &Association) -> Result<()> {
        self.enter()?;
        for class in [&how.class, &how.result_class].into_iter().flatten() {
            known_class(class)?;
        }
        self.class_in(&path.namespace, &path.class)?;
        if self.world.lock().instance_at(path).is_none() {
            return Err(not_found(path, "not found (0x80041002)"));
        }
        Ok(())
    }

    /// Whether the answer of this call is to be lost now.
    fn lost(&self, method: &str, after_effect: bool) -> bool {
        let mut state = self.world.lock();
        let wanted = state
            .faults
            .lost_answer
            .take_if(|(name, effect)| name == method && *effect == after_effect);
        wanted.is_some()
    }

    fn lost_answer(&self) -> CimError {
        CimError::Unreachable {
            peer: self.peer.clone(),
            detail: "the connection was closed before the answer came".into(),
            before_request: false,
        }
    }

    /// An instance as this connection shows it.
    fn formed(&self, mut instance: CimInstance, of_query: bool) -> CimInstance {
        let unknown = self.world.lock().faults.unknown_properties.clone();
        instance.properties.retain(|(name, _)| !unknown.contains(name));
        if self.form == AnswerForm::Typed {
            return instance;
        }
        if of_query {
            instance.path = None;
        }
        for (_, value) in &mut instance.properties {
            *value = as_text(value);
        }
        instance
    }
}

/// A value as WS-Management shows it.
fn as_text(value: &CimValue) -> CimValue {
    match value {
        CimValue::Null | CimValue::Reference(_) | CimValue::Instance(_) => value.clone(),
        CimValue::Boolean(truth) => truth.to_string().into(),
        CimValue::DateTime(text) => crate::instances::iso(text).into(),
        CimValue::Array(_, items) => match items.as_slice() {
            [] => CimValue::Null,
            [one] => as_text(one),
            many => {
                let kind = many[0].cim_type().filter(|k| *k == vmtide_cim::CimType::Reference);
                let kind = kind.unwrap_or(vmtide_cim::CimType::String);
                CimValue::Array(kind, many.iter().map(as_text).collect())
            }
        },
        scalar => embedded::plain(scalar).into(),
    }
}

fn not_found(path: &ObjectPath, detail: &str) -> CimError {
    CimError::NotFound { what: path.to_string(), detail: detail.into() }
}
