;; Creates empty fields for ever and drops none.
(component $guest
  (import "wasi:http/types@0.2.0" (instance $http
    (export "incoming-request" (type (sub resource)))
    (export "fields" (type $fields (sub resource)))
    (export "response-outparam" (type (sub resource)))
    (export "[constructor]fields" (func (result (own $fields))))
  ))
  (alias export $http "incoming-request" (type $incoming-request))
  (alias export $http "response-outparam" (type $response-outparam))

  (core func $fields-new (canon lower (func $http "[constructor]fields")))

  (core module $main-module
    (import "host" "fields-new" (func $fields-new (result i32)))

    (func (export "handle") (param $request i32) (param $out i32)
      (loop $more
        (drop (call $fields-new))
        (br $more)))
  )
  (core instance $main (instantiate $main-module
    (with "host" (instance
      (export "fields-new" (func $fields-new))
    ))
  ))
  (func $handle
    (param "request" (own $incoming-request)) (param "response-out" (own $response-outparam))
    (canon lift (core func $main "handle")))
  (instance $handler (export "handle" (func $handle)))
  (export "wasi:http/incoming-handler@0.2.0" (instance $handler))
)
